"""Experiments as data: a spec file per table or figure, one runner, one report.

python -m experiments list                          # specs, cells, what is done
python -m experiments run table1-smollm2            # resumable cell by cell; a killed run continues
python -m experiments report                        # docs/results.md and docs/figures from the records

``spec`` checks a spec and lists its cells, ``training`` trains their adapters, ``kinds`` measures what a kind of cell asks for,
``runner`` goes through them and ``records`` keeps what came out; ``report`` shows it. ``measuring`` and ``markdown`` serve the
benchmarks and scripts as well. ``system`` and ``injection`` are the two experiments that are not cells.
"""
