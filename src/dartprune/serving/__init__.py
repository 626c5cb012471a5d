"""Serves a model: many requests in one decoding batch, each with masks of its own.

`engine.py` is the loop; it knows requests (`request.py`) and nothing of HTTP. `app.py` is the OpenAI-compatible door,
`batch.py` the one for files.
"""
