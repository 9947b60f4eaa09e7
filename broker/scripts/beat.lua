-- A heartbeat: the worker lives, these leases go on, and what the server thinks otherwise.
--
-- KEYS  1 fleet:worker:W:beat  2 fleet:worker:W:record  3 rq:worker:W  4 fleet:worker:W:leases
--       5 fleet:worker:W:drain  6 fleet:worker:W:labels
-- ARGV  1 worker  2 incarnation  3 lease ms  4 record as JSON  5 ttl of the record s
--       6 number of the last claim whose reply arrived or will never arrive
--       then for each lease it knows: job, lease
-- Returns {'ok' | 'gone' | 'taken', {leases that are no longer ours}, {leases to be stopped},
--          {{job, lease} held under this name by an earlier life}, 1 if draining,
--          1 if suspended, workers registered, flat hash of the operators' labels,
--          version of the sets of requirements}
--
-- 'gone': the keys lapsed (a pause, a flushed Redis): register again. 'taken': another life has
-- the name: stop. Both renew nothing. A lease that the server holds and the worker does not know,
-- from a claim whose reply it no longer waits for, was never started: back to the queue.
local incarnation, settled = ARGV[2], tonumber(ARGV[6])
local current = redis.call('GET', KEYS[1])
if current ~= incarnation then
  return {current and 'taken' or 'gone', {}, {}, {}, 0, 0, 0, {}, 0}
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SET', KEYS[2], ARGV[4], 'EX', ARGV[5])
try('HSET', KEYS[3], 'last_heartbeat', NOW)
redis.call('PEXPIRE', KEYS[3], ARGV[3])

local known, lost, stopped, foreign = {}, {}, {}, {}
local seconds = string.format('%.3f', NOW_MS / 1000)
for i = 7, #ARGV, 2 do
  local id, lease = ARGV[i], ARGV[i + 1]
  local f = job_fields(id)
  known[lease] = true
  if f and f.status == 'started' and f.fleet_lease == lease then
    redis.call('ZADD', K.LEASES, NOW_MS + ARGV[3], id)
    redis.call('HSET', key('job', id), 'last_heartbeat', NOW)
    try('HSET', key('execution', id, execution_of(lease)), 'last_heartbeat', seconds)
    if f.fleet_stop or (f.fleet_array_of and arrays.is_array_stopped(f.fleet_array_of)) then
      table.insert(stopped, lease)
    end
  else
    table.insert(lost, lease)
  end
end

-- Judge one lease that the server has under this name and the worker did not speak of.
local function reconcile(id, lease, number_of_claim)
  local f = job_fields(id)
  if not f or f.status ~= 'started' or f.fleet_lease ~= lease then
    redis.call('HDEL', KEYS[4], id)
  elseif string.sub(execution_of(lease), 1, #incarnation) ~= incarnation then
    table.insert(foreign, {id, lease})
  elseif number_of_claim <= settled then
    setbacks.give_back(id, f, 'handed-back', {reason = 'the reply to the claim was lost'}, true)
  end
end

local held = redis.call('HGETALL', KEYS[4])
for i = 1, #held, 2 do
  local lease, claim = string.match(held[i + 1], '^(%S+) (%d+)$')
  if not known[lease or ''] then
    reconcile(held[i], lease or '', tonumber(claim or 0))
  end
end

-- What operators say of an ephemeral worker goes with its record, as long after the last beat.
local drain_ttl = redis.call('TTL', KEYS[5])
if drain_ttl >= 0 then
  redis.call('EXPIRE', KEYS[5], ARGV[5])
end
local labels = try('HGETALL', KEYS[6]) or {}
if #labels > 0 and redis.call('TTL', KEYS[6]) >= 0 then
  redis.call('EXPIRE', KEYS[6], ARGV[5])
end
return {'ok', lost, stopped, foreign, drain_ttl ~= -2 and 1 or 0, redis.call('EXISTS', K.SUSPENDED),
  redis.call('SCARD', K.FLEET_WORKERS), labels, tonumber(try('GET', K.SETS_VERSION) or 0) or 0}
