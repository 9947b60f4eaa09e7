-- A worker enters the registry, ours and RQ's, under its name; or comes back after its keys lapsed.
--
-- KEYS  1 fleet:worker:W:beat  2 fleet:worker:W:record  3 rq:worker:W  4 fleet:worker:W:signals
-- ARGV  1 worker  2 incarnation  3 incarnation it may replace, or ''  4 lease ms
--       5 record as JSON  6 ttl of the record s  7 number of queues, then their names
--       then fields and values of rq:worker:W
-- Returns '' if registered, else the record of the live worker that has the name.
local worker, incarnation, replaced = ARGV[1], ARGV[2], ARGV[3]
local queue_count = tonumber(ARGV[7])
local current = redis.call('GET', KEYS[1])
if current and current ~= incarnation and current ~= replaced then
  return redis.call('GET', KEYS[2]) or '{}'
end
redis.call('SET', KEYS[1], incarnation, 'PX', ARGV[4])
redis.call('SET', KEYS[2], ARGV[5], 'EX', ARGV[6])
redis.call('SADD', K.FLEET_WORKERS, worker)
redis.call('DEL', KEYS[3], KEYS[4])
redis.call('HSET', KEYS[3], 'birth', NOW, 'last_heartbeat', NOW, 'state', 'idle', unpack(ARGV, 8 + queue_count))
redis.call('PEXPIRE', KEYS[3], ARGV[4])
redis.call('SADD', K.WORKERS, KEYS[3])
for i = 8, 7 + queue_count do
  redis.call('SADD', key('queue_workers', ARGV[i]), KEYS[3])
end
count('registrations')
return ''
