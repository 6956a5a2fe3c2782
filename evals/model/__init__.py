"""The language model that SAEs are trained on and measured in: found, made, loaded, checked, run.

Look first at places.py (a name -> its folder, its digest, its sizes) and at language_model.py (a folder -> residuals).
built_in.py makes the two models that need no hub; folders.py knows what a model's folder holds and lacks,
architecture.py what transformers makes of it, checks.py what can be wrong with a model that was loaded.
memory.py runs an eval in parts where a GPU is too small for it at once.
"""
