-- A worker asks to do the fleet's chores; whoever asks, also tells that Redis is there.
--
-- KEYS  1 fleet:chores  2 fleet:chores:seen  3 fleet:recovery:not-before  4 fleet:losses:not-before
--       5 fleet:alive
-- ARGV  1 incarnation  2 ms for which one is elected  3 lease ms
--       4 gap ms: nobody asked for longer: Redis may have been away
--       5 1 if the worker knows that it was, by an error or a late answer since it last asked
-- Returns {1 if elected, workers that beat when they were last counted}
--
-- After an outage, or a jump of Redis's clock, every lease looks expired: recovery pauses for one
-- lease, in which workers renew theirs. What ran out before that ended counts for nobody, if it is
-- known that Redis was to blame: another server answers, its clock was set back, or a worker that
-- lived through it says so. Silence alone may mean that a job has killed every worker there was.
local incarnation, election_ms, lease_ms, gap_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

-- This server's run id; '' where the user may not ask for it.
local function server()
  local info = redis.pcall('INFO', 'server')
  return type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
end

local function watch_for_outage()
  local at, known = string.match(redis.call('GET', KEYS[2]) or '', '^(%d+) ?(%w*)$')
  local seen, here = tonumber(at or 0), server()
  redis.call('SET', KEYS[2], string.format('%d %s', NOW_MS, here ~= '' and here or known or ''))
  local is_known = NOW_MS < seen or (here ~= '' and (known or '') ~= '' and here ~= known)
  if is_known or NOW_MS - seen > gap_ms then
    redis.call('SET', KEYS[3], NOW_MS + lease_ms, 'PX', 4 * lease_ms)
  end
  local pause = tonumber(redis.call('GET', KEYS[3]) or 0)
  if is_known or (ARGV[5] == '1' and NOW_MS < pause) then
    redis.call('SET', KEYS[4], pause, 'PX', 4 * lease_ms)
  end
end

local function elect()
  local current = redis.call('GET', KEYS[1])
  if current and current ~= incarnation then
    if redis.call('PTTL', KEYS[1]) > election_ms then -- the clock was set back
      redis.call('PEXPIRE', KEYS[1], election_ms)
    end
    return 0
  end
  redis.call('SET', KEYS[1], incarnation, 'PX', election_ms)
  return 1
end

watch_for_outage()
return {elect(), number(redis.call('GET', KEYS[5]), 0)}
