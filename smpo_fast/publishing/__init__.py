"""What others get of a finished run: the files of its repository on the hub, and the model card that describes them."""
