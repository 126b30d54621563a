"""SmPO-Diffusion: align SDXL and SD1.5 with preference pairs."""

__version__ = "0.1.0"
