"""One training as a thing on disk and in a worker: its job, header, resumption, exports."""
