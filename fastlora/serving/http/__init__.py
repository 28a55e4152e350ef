"""An engine behind HTTP, in OpenAI's format: ``app`` makes the application, ``server`` runs it."""
