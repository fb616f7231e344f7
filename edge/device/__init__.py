"""What this device has: memory, cores, and how fast both are.

    memory.py   what can be had, and what this process has
    cores.py    which cores help, and how many threads
    machine.py  how fast memory is read and integers are multiplied here
    budget.py   what both engines count of the memory, beside their own

Each imports from those above it.
"""
