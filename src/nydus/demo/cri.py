"""A small CRI client: pull an image, run containers of it on the host's network, read what they print."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from nydus.errors import NydusError
from nydus.snapshotter.api import cri_pb2 as wire
from nydus.snapshotter.api.cri_pb2_grpc import ImageServiceStub, RuntimeServiceStub

TIMEOUT = 120.0
_NODE = wire.NamespaceOption(network=wire.NODE)  # no CNI plugin is needed


class CriError(NydusError):
    """The runtime refused; the text is its own."""


class Pod:
    """One sandbox; made by :meth:`Cri.pod`."""

    def __init__(self, cri: Cri, sandbox_id: str, config: Any) -> None:
        self._cri, self.id, self._config = cri, sandbox_id, config

    def create(self, image: str, command: Sequence[str] = (), name: str = "main") -> Container:
        """Create a container of an image that has been pulled; ``command`` replaces the image's."""
        config = wire.ContainerConfig(
            metadata=wire.ContainerMetadata(name=name),
            image=wire.ImageSpec(image=image),
            command=list(command),
            log_path=f"{name}.log",
            linux=wire.LinuxContainerConfig(
                security_context=wire.LinuxContainerSecurityContext(namespace_options=_NODE)
            ),
        )
        request = wire.CreateContainerRequest(
            pod_sandbox_id=self.id, config=config, sandbox_config=self._config
        )
        made = self._cri.call(self._cri.runtime.CreateContainer, request)
        return Container(self._cri, made.container_id, Path(self._config.log_directory) / f"{name}.log")

    def run(self, image: str, command: Sequence[str] = (), name: str = "main") -> Container:
        """Create a container and start it."""
        container = self.create(image, command, name)
        container.start()
        return container

    def remove(self) -> None:
        """Stop and remove the pod with all its containers."""
        self._cri.call(self._cri.runtime.StopPodSandbox, wire.StopPodSandboxRequest(pod_sandbox_id=self.id))
        self._cri.call(
            self._cri.runtime.RemovePodSandbox, wire.RemovePodSandboxRequest(pod_sandbox_id=self.id)
        )
        self._cri.pods.discard(self)


class Container:
    """One container; made by :meth:`Pod.create`."""

    def __init__(self, cri: Cri, container_id: str, log: Path) -> None:
        self._cri, self.id, self._log = cri, container_id, log

    def start(self) -> None:
        """Start it; the program runs when this returns."""
        self._cri.call(self._cri.runtime.StartContainer, wire.StartContainerRequest(container_id=self.id))

    def running(self) -> bool:
        """It has been started and has not ended."""
        return bool(self._status().state == wire.CONTAINER_RUNNING)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Its exit code, when it has ended.

        Raises:
            CriError: it runs on after ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while True:
            status = self._status()
            if status.state == wire.CONTAINER_EXITED:
                return int(status.exit_code)
            if time.monotonic() > end:
                raise CriError(f"container {self.id[:12]} runs on after {timeout:g} s")
            time.sleep(0.01)

    def first_output(self, timeout: float = TIMEOUT) -> float:
        """Wait for the first byte it prints; the moment on the monotonic clock, known to 2 ms.

        Raises:
            CriError: ``timeout`` seconds have passed.
        """
        end = time.monotonic() + timeout
        while not self._log.exists() or not self._log.stat().st_size:
            if time.monotonic() > end:
                raise CriError(f"container {self.id[:12]} has printed nothing")
            time.sleep(0.002)
        return time.monotonic()

    def execute(self, *command: str, timeout: int = 60) -> tuple[int, bytes]:
        """Run a command inside; its exit code and all it printed.

        Raises:
            CriError: it cannot be run, or did not end in ``timeout`` seconds.
        """
        request = wire.ExecSyncRequest(container_id=self.id, cmd=command, timeout=timeout)
        answer = self._cri.call(self._cri.runtime.ExecSync, request)
        return answer.exit_code, answer.stdout + answer.stderr

    def output(self) -> str:
        """What it has printed so far, without the log's prefix of each line."""
        with suppress(FileNotFoundError):
            return "".join(
                line.split(" ", 3)[3]
                for line in self._log.read_text().splitlines(keepends=True)
                if line.count(" ") > 2
            )
        return ""

    def remove(self) -> None:
        """Remove it, running or not."""
        self._cri.call(self._cri.runtime.RemoveContainer, wire.RemoveContainerRequest(container_id=self.id))

    def _status(self) -> Any:
        request = wire.ContainerStatusRequest(container_id=self.id)
        return self._cri.call(self._cri.runtime.ContainerStatus, request).status


class Cri:
    """A client of the runtime and image services on one UNIX socket.

    Args:
        address: the socket.
        logs: a directory for what containers print.
    """

    def __init__(self, address: Path, logs: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{address}")
        self.runtime, self.images = RuntimeServiceStub(self._channel), ImageServiceStub(self._channel)
        self._logs = logs
        self.pods: set[Pod] = set()

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until the runtime answers.

        Raises:
            CriError: it does not.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                self.call(self.runtime.Version, wire.VersionRequest(), timeout=2)
                return
            except CriError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def pull(self, image: str, *, username: str = "", password: str = "") -> str:
        """Pull an image; returns its ID."""
        auth = wire.AuthConfig(username=username, password=password) if username else None
        request = wire.PullImageRequest(image=wire.ImageSpec(image=image), auth=auth)
        return str(self.call(self.images.PullImage, request, timeout=600).image_ref)

    def image_ids(self) -> list[str]:
        """The IDs of all images."""
        answer = self.call(self.images.ListImages, wire.ListImagesRequest())
        return [image.id for image in answer.images]

    def remove_image(self, image: str) -> None:
        """Remove an image by reference or ID; no error if there is none."""
        self.call(self.images.RemoveImage, wire.RemoveImageRequest(image=wire.ImageSpec(image=image)))

    def pod(self, name: str = "") -> Pod:
        """Run a sandbox on the host's network."""
        uid = uuid.uuid4().hex
        directory = self._logs / uid
        directory.mkdir(parents=True)
        config = wire.PodSandboxConfig(
            metadata=wire.PodSandboxMetadata(name=name or f"pod-{uid[:8]}", uid=uid, namespace="default"),
            log_directory=str(directory),
            linux=wire.LinuxPodSandboxConfig(
                security_context=wire.LinuxSandboxSecurityContext(namespace_options=_NODE)
            ),
        )
        made = self.call(self.runtime.RunPodSandbox, wire.RunPodSandboxRequest(config=config))
        pod = Pod(self, made.pod_sandbox_id, config)
        self.pods.add(pod)
        return pod

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def call(self, method: Any, request: Any, *, timeout: float = TIMEOUT) -> Any:
        """One call of a stub's method."""
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise CriError(f"{type(request).__name__}: {error.details()}") from None
