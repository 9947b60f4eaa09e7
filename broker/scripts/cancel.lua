-- Cancel a job: out of the queue at once, or a durable wish and a message where it runs.
--
-- KEYS  1 rq:job:ID
-- ARGV  1 job  2 ttl s of a canceled job
-- Returns 'canceled', 'stopping', the status of a job that has ended, or '' for no such job.
local id, ttl = ARGV[1], tonumber(ARGV[2])
local f = job_fields(id)
if not f then
  return ''
end
if f.status == 'started' and f.fleet_lease then
  redis.call('HSET', KEYS[1], 'fleet_stop', '1')
  local signals = key('worker_signals', f.worker_name or '')
  redis.call('RPUSH', signals, cjson.encode({stop = id}))
  redis.call('EXPIRE', signals, 60)
  return 'stopping'
end
if f.status == 'finished' or f.status == 'failed' or f.status == 'stopped' or f.status == 'canceled' then
  return f.status
end
try('LREM', key('queue', f.origin), 0, id)
try('ZREM', key('scheduled', f.origin), id)
try('ZREM', key('deferred', f.origin), id)
redis.call('HSET', KEYS[1], 'status', 'canceled', 'ended_at', NOW)
try('ZADD', key('canceled', f.origin), math.floor(NOW_MS / 1000), id)
enqueue_dependents(id, 'canceled')
keep(id, f, ttl)
return 'canceled'
