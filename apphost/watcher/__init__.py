"""The watcher process of development mode: tells the arbiter which files of the application have changed."""
