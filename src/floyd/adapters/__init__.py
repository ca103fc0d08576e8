"""LoRA: files of every format onto the layers of a network, and off again."""
