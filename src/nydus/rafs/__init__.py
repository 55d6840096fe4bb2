"""The RAFS formats, bytes in and bytes out. Imports nothing of ours but :mod:`nydus.errors`."""
