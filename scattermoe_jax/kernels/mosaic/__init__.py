"""The Hopper backend: Pallas Mosaic GPU."""
