"""Quantised models, made from others.

encode.py  rows of weights as blocks of a type, and back
"""
