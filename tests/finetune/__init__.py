"""Tests of the application. They build tiny random models, a tokenizer and data themselves: no network, no ../shared needed."""
