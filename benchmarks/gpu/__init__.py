"""``make gpu``: what is worth most on a GPU first, watched and resumable."""
