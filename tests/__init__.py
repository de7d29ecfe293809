"""Tests of the packages; `support` holds what they share."""
