-- Cancel a job: out of the queue at once, or a durable wish and a message where it runs.
--
-- KEYS  1 rq:job:ID
-- ARGV  1 job  2 ttl s of a canceled job
-- Returns 'canceled', 'stopping', the status of a job that has ended, '' for no such job, or 'array':
-- cancel_arrays.lua is for these.
return arrays.cancel_job(ARGV[1], tonumber(ARGV[2]))
