"""A containerd on this machine as a place of containers and images, seen as its client."""
