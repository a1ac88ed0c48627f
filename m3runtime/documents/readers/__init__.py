"""Readers of file formats, one file each: a file becomes parts, and headings become Markdown's."""
