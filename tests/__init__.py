"""Tests of lab4.py and of the practice server, mathserver.py."""
