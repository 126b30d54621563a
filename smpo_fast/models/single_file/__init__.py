"""Single-file checkpoints in the layout of the original SDXL and SD1.5 repositories: recognise, convert, write.

`header` reads what a safetensors file says of itself, `recognise` tells a supported checkpoint from all others,
`layout` is the table of tensor names, `parts` has the networks, `convert` makes a diffusers folder of a file, `write` a
file of a pipeline.
"""
