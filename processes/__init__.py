"""How gunicorn runs the service. `gunicorn.conf.py` names what stands here; all of it is imported once."""
