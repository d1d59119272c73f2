"""SQL functions that compute and do nothing else; every other name is refused."""

from __future__ import annotations

AGGREGATES = "avg count group_concat max median min mode stddev stddev_pop stddev_samp string_agg sum total var_pop var_samp variance"
NUMBERS = "abs ceil ceiling exp floor greatest least ln log log10 log2 mod pow power round sign sqrt trunc"
TEXTS = (
    "char_length concat contains ends_with instr left length like likely lower ltrim position replace right rtrim starts_with "
    "strlen strpos substr substring trim unlikely upper"
)
DATES = (
    "date date_diff date_part date_trunc datediff datepart datetime datetrunc day dayofweek dayofyear extract hour julianday "
    "minute month quarter second strftime strptime time unixepoch week weekday year"
)
CHOICES = "case cast coalesce glob ifnull iif nullif try_cast typeof"
WINDOWS = "cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number"
ALLOWED = frozenset(" ".join((AGGREGATES, NUMBERS, TEXTS, DATES, CHOICES, WINDOWS)).split())
