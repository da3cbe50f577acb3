"""Is muP right? Sizes of activations, and the best learning rate, over widths of the same model, with and without it.

`points` says what is trained, `worker` trains it, `sweep` submits the workers, `figures` reads what they wrote, `page`
draws it. `tools/mup_sweep.py` is the command.
"""
