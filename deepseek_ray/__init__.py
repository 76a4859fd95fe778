"""deepseek_ray: one MLOps loop on Ray for teams that own a live decision."""

__version__ = "0.1.0"
