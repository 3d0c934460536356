"""What the service is made of. `app.py` puts it together, and `processes/` runs it under gunicorn."""

VERSION = "0.1.0"  # of this service, as CHANGELOG.md has it
