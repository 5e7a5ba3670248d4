"""The torch engine: slices of `transformers` models, with attention and KV memory of our own.

`engine` is the way in; `slicing` builds the stage's part of the model, `weights` fills it from files,
`attention` replaces the model's attention function and `kv` owns the cache that it reads.
"""
