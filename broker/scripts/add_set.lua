-- A set of requirements that some job is about to have.
--
-- KEYS  1 fleet:sets:BASE
-- ARGV  1 base  2 digest  3 what it asks for, JSON
-- Returns 1 if it was not known.
return lists.add_set(ARGV[1], ARGV[2], ARGV[3]) and 1 or 0
