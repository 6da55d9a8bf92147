"""Verdicts on variants: counts in, evidence out. No clock, no thread, no I/O.

The gateway knows the probability with which each request was given to the candidate. If the two
variants are no different, nothing that happened can tell which of them it happened to; so a bet on
the variant, made from what happened, cannot be expected to win. Evidence is the factor by which
such bets have multiplied: without a difference it ever reaches 1/alpha with probability alpha at
most (Ville's inequality), however often one looks, however the traffic, its errors and the weights
change meanwhile. Only integer counts per weight are kept, so evidence adds up over workers.

All functions take arrays with any number of leading axes, so that thousands of rollouts are judged
at once.
"""
