"""The main job: training a language model on text. It uses zerompi's public API only."""
