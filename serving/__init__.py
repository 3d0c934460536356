"""What the service is made of. `app.py` puts it together, and `processes/` runs it under gunicorn."""
