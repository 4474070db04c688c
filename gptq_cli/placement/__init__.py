"""Where things are and where they go: devices, the language of device maps, placements."""
