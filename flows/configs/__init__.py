"""Ladders that come with the package, by name: `bitladder run NAME`."""
