"""Contract suites for authors of backends: subclass one in your tests and say how to make your backend.

The classes have no ``Test`` prefix, so pytest collects only their subclasses. They need pytest, which
m3runtime itself does not install.
"""
