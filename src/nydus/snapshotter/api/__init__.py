"""Wire messages and stubs of containerd and the CRI.

The ``.proto`` files hold the part of each service that is used here, written from its field numbers; unknown
fields pass through. ``scripts/protos`` regenerates the Python files.
"""
