"""The Lance home: one table on a folder, for processes on one or more machines that write and read at once."""
