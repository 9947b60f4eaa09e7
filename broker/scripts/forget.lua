-- An operator removes the record of a worker that is offline, and the labels that operators gave it.
--
-- KEYS  1 fleet:worker:W:beat  2 fleet:worker:W:record  3 rq:worker:W  4 fleet:worker:W:signals
--       5 fleet:worker:W:leases  6 fleet:worker:W:ended  7 fleet:worker:W:labels
-- ARGV  1 worker
-- Returns {'forgotten' | 'not_found' | 'alive' | 'leases', jobs it holds that others must take first}.
--
-- Entries of jobs that are no longer under its lease (deleted, ended by another) count for nothing.
local worker = ARGV[1]
local record = redis.call('GET', KEYS[2])
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {'alive', redis.call('HLEN', KEYS[5])}
end
local held = redis.call('HGETALL', KEYS[5])
local left = 0
for i = 1, #held, 2 do
  local lease = string.match(held[i + 1], '^(%S+)')
  local f = job_fields(held[i])
  if f and f.status == 'started' and f.fleet_lease == lease then
    left = left + 1
  else
    redis.call('HDEL', KEYS[5], held[i])
  end
end
if left > 0 then
  return {'leases', left}
end
local known = redis.call('SREM', K.FLEET_WORKERS, worker)
if not record and known == 0 and redis.call('EXISTS', KEYS[7]) == 0 then
  return {'not_found', 0}
end
redis.call('DEL', unpack(KEYS))
redis.call('SREM', K.WORKERS, KEYS[3])
local ok, fields = pcall(cjson.decode, record or '{}')
local queues = ok and type(fields) == 'table' and fields.queues
for _, queue in ipairs(type(queues) == 'table' and queues or {}) do
  redis.call('SREM', key('queue_workers', tostring(queue)), KEYS[3])
end
return {'forgotten', 0}
