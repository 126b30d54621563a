"""SmPO-Diffusion: align SDXL and SD1.5 with preference pairs."""

import logging

__version__ = "0.1.0"

# Both warn at import of what training never uses: picture processors of torchvision, 4-bit matrix products on a CPU.
for _name in ("transformers.utils.import_utils", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
