"""A stand-in for nydusd: mounts a tmpfs with a copy of the bootstrap, answers what the snapshotter asks.

A bootstrap with the text ``die`` makes it fail as a daemon does: a line on standard error and a status of 3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from urllib.parse import parse_qs, urlsplit

parser = argparse.ArgumentParser()
parser.add_argument("mode")
for option in ("log-file", "log-rotation-size", "id", "supervisor"):
    parser.add_argument(f"--{option}")
parser.add_argument("--upgrade", action="store_true")
for option in ("config", "bootstrap", "mountpoint", "apisock", "log-level", "failover-policy", "thread-num"):
    parser.add_argument(f"--{option}")
arguments = parser.parse_args()
mounted: list[str] = []
state = "INIT" if arguments.upgrade else "RUNNING"


def hand_over() -> None:
    """The state is the list of mounts, the descriptor one of no use."""
    with socket.socket(socket.AF_UNIX) as connection, open("/dev/null") as device:
        connection.connect(arguments.supervisor)
        socket.send_fds(connection, [json.dumps(mounted).encode()], [device.fileno()])


def take_over() -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(arguments.supervisor)
        data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 4)
        assert len(descriptors) == 1
        mounted.extend(json.loads(data))


def mount(target: str, bootstrap: str) -> None:
    text = Path(bootstrap).read_text()
    if text == "die":
        print("nydusd: this bootstrap cannot be mounted", file=sys.stderr)
        sys.exit(3)
    if text == "slow":
        time.sleep(1)
    os.makedirs(target, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "fake", target], check=True)
    shutil.copy(bootstrap, Path(target) / "image.boot")
    mounted.append(target)


def unmount(target: str) -> None:
    subprocess.run(["umount", "-l", target], check=False)
    mounted.remove(target)


class Handler(BaseHTTPRequestHandler):
    def answer(self, status: int, body: object = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def inside(self) -> str:
        query = parse_qs(urlsplit(self.path).query)
        return f"{arguments.mountpoint}{query['mountpoint'][0]}"

    def do_GET(self) -> None:
        inside = {target.removeprefix(arguments.mountpoint) or "/": {} for target in mounted}
        self.answer(200, {"state": state, "id": None, "backend_collection": inside})

    def do_PUT(self) -> None:
        global state
        what = self.path.rpartition("/")[2]
        if what == "sendfd":
            hand_over()
        elif what == "takeover":
            take_over()
            state = "READY"
        elif what == "start":
            state = "RUNNING"
        elif what == "exit":  # its mounts stay
            state = "STOPPED"
            threading.Timer(1, os._exit, (0,)).start()
        self.answer(204)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            mount(self.inside(), body["source"])
        except SystemExit:
            self.answer(500, {"code": "UNDEFINED", "message": "this bootstrap cannot be mounted"})
        else:
            self.answer(204)

    def do_DELETE(self) -> None:
        if self.inside() not in mounted:
            self.answer(500, {"code": "UNDEFINED", "message": "not mounted"})
            return
        unmount(self.inside())
        self.answer(204)

    def log_message(self, *_: object) -> None:
        pass

    def address_string(self) -> str:
        return ""


class Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


def end(*_: object) -> None:
    for target in reversed(list(mounted)):
        unmount(target)
    os._exit(0)


signal.signal(signal.SIGTERM, end)
if not arguments.bootstrap and not arguments.upgrade:
    subprocess.run(["mount", "-t", "tmpfs", "fake", arguments.mountpoint], check=True)
    mounted.append(arguments.mountpoint)
elif not arguments.upgrade:
    mount(arguments.mountpoint, arguments.bootstrap)
Server(arguments.apisock, Handler).serve_forever()
