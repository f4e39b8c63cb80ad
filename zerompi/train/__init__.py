"""The main job: training a language model on text.

Beside the public API it uses zerompi's launch, errors, report and checkpoint.
"""
