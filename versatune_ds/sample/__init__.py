"""The sample corpus of the quick start: 300 instruction pairs over six domains, shipped as package data.

`train/` and `eval/` hold one file per domain and are read through `importlib.resources`
(`versatune_ds.data.sample` unpacks them); README.md beside this file says what they are.

What is not covered: a model of use to anybody. The corpus shows that the pipeline works; it is far too
small to teach a model its six domains.
"""
