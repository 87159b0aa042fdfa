"""Tests of the application. They build tiny random models, a tokenizer and data themselves; neither network nor ../shared is needed."""
