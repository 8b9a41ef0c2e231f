"""The worker process: loads the application, serves it, drains."""
