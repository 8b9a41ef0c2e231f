"""The master process: decides with a pure fleet, performs with a select loop, and runs nothing of the application."""
