"""The MLX engine: slices of `mlx-lm` models, with batching and KV memory of our own.

`engine` is the way in; `families` says what is special about each family, `arguments` and `rotations` read the
configuration as mlx-lm wants it, `slicing` cuts the stage's part out of the model, `weights` fills it from files,
`cache` owns the KV memory, `positions` is what a layer sees of it during a step, `tensors` and `device` are the ways
in and out of MLX's memory.
"""
