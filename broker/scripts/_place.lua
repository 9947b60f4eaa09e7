-- Which lists of a queue a claim takes from, and in which order; for round.lua.
--
-- The worker has judged each set of requirements when it first saw it. Here it is only looked at which of their
-- sublists have jobs, which of these fit what the worker has free, and whose turn it is:
--   - the level with the highest PRIORITY + NEGLECT / ageing, where neglect is the time since it last gave out a
--     job or, if that is less, since its first job waits: strict order, yet now and then a job of those below;
--   - within a level the list whose first job waits longest; the plain list is one of level 0;
--   - what does not fit is passed over. Where its first jobs have waited too long, workers hold room for one each,
--     and fill only what they have beyond that: as many workers as jobs wait, yet one in forty at most.
local BATCH_MS, BATCH_SHARE = 5000, 0.05 -- jobs that came so close together, also for what they waited, go in one go
local PAGE, PAGES = 4, 64 -- heads of a level read at once: at first, and before ours are asked for by name
local MANY = 1e9
local HOLDERS = 40 -- of so many workers one at most holds room for jobs of a list, but always one

local left            -- what the worker has free, as far as this call knows: slots, ahead, cpus (1/1000), mebibytes
local touched = {}    -- lists that were looked at: since when their first job waits, or false
local quiet = {}      -- lists of which this worker met no job but those that are for others
local needs = {}

-- What a job counts, as fleet/placement.py packs it: MILLICPUS,MIB,KIND. Kinds: a as a plain job, begun or claimed
-- ahead; r takes room; g also GPUs, which are free; G which are not; x the whole worker.
local function need_of(text)
  if not needs[text] then
    local cpus, mebibytes, kind = string.match(text, '^(%d+),(%d+),(%a)$')
    needs[text] = {cpus = tonumber(cpus), mebibytes = tonumber(mebibytes), kind = kind}
  end
  return needs[text]
end

-- How many jobs can begin at once. Once GPUs were given, or room for some is held, the worker must count them anew.
local function fitting(need)
  local kind, most = need.kind, left.slots
  if kind == 'G' or (kind == 'g' and left.gpus_changed) or (kind == 'x' and left.in_use) then
    return 0
  end
  if need.cpus > 0 then
    most = math.min(most, math.floor(left.cpus / need.cpus))
  end
  if need.mebibytes > 0 then
    most = math.min(most, math.floor(left.mebibytes / need.mebibytes))
  end
  return (kind == 'g' or kind == 'x') and math.min(most, 1) or most
end

local function ahead_of(need)
  return need.kind == 'a' and left.ahead or 0
end

local function subtract(need, jobs)
  left.slots = math.max(0, left.slots - jobs)
  left.cpus = math.max(0, left.cpus - jobs * need.cpus)
  left.mebibytes = math.max(0, left.mebibytes - jobs * need.mebibytes)
  left.in_use = true
  if need.kind == 'x' then
    left.slots, left.ahead = 0, 0
  end
end

-- --- heads ---------------------------------------------------------------------------------------

-- Of all of a level that wait, those that the worker may take: digest, since, and so on.
local function ours(level)
  local digests, rows, flat = {}, {}, {}
  for digest in string.gmatch(level.known, ';(%w+)=') do
    digests[#digests + 1] = digest
  end
  for from = 1, #digests, MOST_ARGUMENTS do
    local some = {unpack(digests, from, math.min(from + MOST_ARGUMENTS - 1, #digests))}
    for i, since in ipairs(redis.pcall('ZMSCORE', level.heads, unpack(some))) do
      if since then
        rows[#rows + 1] = {some[i], tonumber(since)}
      end
    end
  end
  table.sort(rows, function(a, b) return a[2] < b[2] end)
  for _, row in ipairs(rows) do
    flat[#flat + 1], flat[#flat + 2] = row[1], row[2]
  end
  return flat
end

local function insert(level, list)
  local found, at = level.found, #level.found + 1
  while at > level.at and found[at - 1].since > list.since do
    at = at - 1
  end
  table.insert(found, at, list)
end

local function add(level, rows)
  for i = 1, #rows, 2 do
    local queue = level.base .. '@' .. rows[i]
    local _, at = string.find(level.known, ';' .. rows[i] .. '=', 1, true)
    if at and not level.passed[queue] then
      local need = string.sub(level.known, at + 1, string.find(level.known, ';', at, true) - 1)
      level.found[#level.found + 1] = {queue = queue, need = need_of(need), since = tonumber(rows[i + 1])}
      lists.heads_by_queue[queue] = {level.heads, rows[i]}
    end
  end
end

-- The lists of a level, the one whose first job waits longest first; not those passed over.
local function read(level)
  if level.found then
    flush() -- what was noted of them in this call
  end
  level.found, level.at = {}, 1
  repeat
    local rows = level.page > PAGES and ours(level)
      or redis.pcall('ZRANGE', level.heads, 0, level.page - 1, 'WITHSCORES')
    level.is_whole = level.page > PAGES or #rows < 2 * level.page
    level.page = 4 * level.page
    add(level, rows)
  until level.is_whole or #level.found > 0
  if level.plain and not level.passed[level.base] then
    local since = lists.look_at_head(level.base)
    touched[level.base] = since or false
    if since then
      insert(level, {queue = level.base, need = level.plain, since = since})
    end
  end
end

-- Its next list, or nil.
local function first_of(level)
  if not level.found or (level.at > #level.found and not level.is_whole) then
    read(level)
  end
  return level.found[level.at]
end

-- --- taking --------------------------------------------------------------------------------------

-- Note since when the first job of a list waits now, that which was before it being taken; nil: it is to be
-- looked for, false: there is none. Returns that, or nil.
local function note_next(queue, since)
  local heads = lists.heads_of(queue)
  if since == nil then
    since = lists.look_at_head(queue) or false
  elseif heads and since then
    later('ZADD', heads[1], digits[since], heads[2])
  elseif heads then
    try('ZREM', heads[1], heads[2])
  end
  touched[queue] = since
  return since or nil
end

-- Up to `most` jobs of a list, none that came after `latest`. Returns how many, and since when the next waits.
local function take(list, most, latest)
  local now = fitting(list.need)
  local given, since, is_for_others = left.claim(list.queue, math.min(most, now + ahead_of(list.need)), now, latest)
  quiet[list.queue] = is_for_others
  if given > 0 then
    left.has_given_gpus = left.has_given_gpus or list.need.kind == 'g'
    left.gpus_changed = left.gpus_changed or list.need.kind == 'g'
    subtract(list.need, math.min(given, now))
    left.ahead = math.max(0, left.ahead - math.max(0, given - now))
  end
  return given, note_next(list.queue, since)
end

-- When room that was held was last given to a job of the list: key and field.
local function last_held(queue)
  local base, digest = string.match(queue, '^([^@]*)@?(.*)$')
  return key('served', base), 'held:' .. digest
end

-- Since when its first job waits for room: the next after one for which room was held is as old, yet where jobs of
-- a higher priority wait, its time begins then.
local function waits_since(queue, is_outranked)
  local since = lists.look_at_head(queue)
  local held = since and is_outranked and redis.call('HGET', last_held(queue))
  return since and math.max(since, tonumber(held or 0) or 0)
end

-- Hold room for one job of a list, unless enough workers do.
local function hold(queue)
  local holders = key('reserved', queue)
  redis.call('ZREMRANGEBYSCORE', holders, '-inf', NOW_MS)
  local most = math.min(redis.call('LLEN', key('queue', queue)),
    math.max(1, math.floor(redis.call('SCARD', K.FLEET_WORKERS) / HOLDERS)))
  local others = redis.call('ZCARD', holders) - (redis.call('ZSCORE', holders, left.worker) and 1 or 0)
  if others >= most then
    return false
  end
  redis.call('ZADD', holders, NOW_MS + left.hold_ms, left.worker)
  redis.call('PEXPIRE', holders, left.hold_ms)
  return true
end

local function reserve(queue, need)
  left.reserved, left.ahead = queue, 0
  subtract(need, 1)
end

-- It does not fit. Nothing is claimed ahead of what fits as soon as the next job ends.
local function pass_over(level, list)
  local need = list.need
  level.at, level.passed[list.queue] = level.at + 1, true
  if need.kind ~= 'a' and need.kind ~= 'x' and need.cpus <= left.next_cpus and need.mebibytes <= left.mebibytes then
    left.ahead = 0
  end
  local waits_for_room = need.kind ~= 'a' or left.slots > 0
  if waits_for_room and NOW_MS - list.since >= left.reserve_ms and left.reserved == '' then
    local since = waits_since(list.queue, left.highest_passed > level.priority) -- it may have been taken away
    if since and NOW_MS - since >= left.reserve_ms and hold(list.queue) then
      reserve(list.queue, need)
      left.gpus_changed = left.gpus_changed or need.kind == 'g' or need.kind == 'G'
    end
  end
  left.highest_passed = math.max(left.highest_passed, level.priority)
end

-- How young a job of the first list may be to be taken before those of the next, ms; nil: there are no others.
local function latest_of(level)
  local second = level.found[level.at + 1]
  if second or not level.is_whole then
    local since = (second or level.found[level.at]).since
    return since + BATCH_MS + BATCH_SHARE * math.max(0, NOW_MS - since)
  end
end

-- Take from the first list of a level, or pass it over.
local function serve(level, most)
  local list = first_of(level)
  if fitting(list.need) + ahead_of(list.need) < 1 then
    pass_over(level, list)
    return
  end
  local given, since = take(list, most, latest_of(level))
  level.at = level.at + 1
  if given > 0 then
    level.is_served = level.is_served or NOW_MS - level.served >= left.ageing_ms / 10
    level.served = NOW_MS
  end
  if since and given == 0 and since <= list.since then
    level.passed[list.queue] = true -- a job that may not be claimed ahead
  elseif since then
    list.since = since
    insert(level, list)
  end
end

-- --- levels --------------------------------------------------------------------------------------

-- The levels of a base of which the worker satisfies sets, and level 0: `known` is what it packed,
-- PRIORITY;DIGEST=NEED;DIGEST=NEED;|PRIORITY;...
local function levels_of(base, known, plain)
  local levels, priorities = {}, {}
  local function open(priority, text)
    levels[#levels + 1] = {priority = tonumber(priority), base = base, known = text, passed = {},
      heads = key('heads', base, priority), page = math.min(PAGE, left.slots + left.ahead + 1), plain = priority == '0' and plain}
    priorities[#levels] = priority
  end
  local from, has_zero = 1, false
  while from < #known do
    local sets = string.find(known, ';', from, true)
    local stop = string.find(known, '|', sets, true)
    local priority, is_whole = string.sub(known, from, sets - 1), from == 1 and not stop
    open(priority, is_whole and known or string.sub(known, sets, stop and stop - 1)) -- a long text is dear to copy
    from, has_zero = stop and stop + 1 or #known, has_zero or priority == '0'
  end
  if not has_zero then
    open('0', ';')
  end
  local served = try('HMGET', key('served', base), unpack(priorities)) or {}
  for i, level in ipairs(levels) do
    level.served, level.is_served = tonumber(served[i] or NOW_MS) or NOW_MS, not served[i]
  end
  return levels
end

local function score(level)
  local list = first_of(level)
  local neglect = list and math.max(0, NOW_MS - math.max(level.served, list.since))
  return list and level.priority + neglect / left.ageing_ms
end

-- Whose turn it is, and how many jobs in a row: one that comes before its better waits for another turn.
local function best_of(levels)
  local best, highest
  for _, level in ipairs(levels) do
    local its = score(level)
    if its and (not best or its > highest) then
      best, highest = level, its
    end
  end
  for _, level in ipairs(best and levels or {}) do
    if level.priority > best.priority and first_of(level) then
      return best, 1
    end
  end
  return best, MANY
end

-- Claim from the lists of a base.
local function claim_from(base, known)
  local levels = levels_of(base, known, left.plain)
  while left.slots > 0 or left.ahead > 0 do
    local level, most = best_of(levels)
    if not level then
      break
    end
    serve(level, most)
  end
  local served = {}
  for _, level in ipairs(levels) do
    if level.is_served then
      served[#served + 1], served[#served + 2] = level.priority, digits[level.served]
    end
  end
  if #served > 0 then
    try('HSET', key('served', base), unpack(served))
  end
end

-- The list for which this worker holds room comes before all others; the room goes once a job of it was given,
-- or others took them, or hold room for all that are left.
local function serve_reserved(queue, need)
  local base = string.match(queue, '^[^@]*')
  local waits = redis.pcall('LLEN', key('queue', queue))
  local is_ours = waits ~= 0 and type(waits) == 'number' and redis.call('SISMEMBER', K.PAUSED, base) == 0 and hold(queue)
  if is_ours and (fitting(need) == 0 or take({queue = queue, need = need}, 1) == 0) then
    reserve(queue, need)
    return
  end
  redis.call('ZREM', key('reserved', queue), left.worker)
  if is_ours then
    local served, field = last_held(queue)
    try('HSET', served, field, digits[NOW_MS])
  end
end

local function words_of(text)
  local words = {}
  for word in string.gmatch(text, '%S+') do
    words[#words + 1] = word
  end
  return words
end

-- `text`: what the worker has free, and what jobs count there, as fleet/placement.py packs it. `claim` is
-- given a list, how many jobs are wanted of it, how many of these begin at once, and the latest that counts, ms.
local function begin(text, worker, slots, ahead, claim)
  local cpus, mebibytes, next_cpus, in_use, plain, ageing, reserve_ms, hold_ms, held, need =
    unpack(words_of(text))
  left = {worker = worker, slots = slots, ahead = ahead, claim = claim, cpus = tonumber(cpus),
    mebibytes = tonumber(mebibytes), next_cpus = tonumber(next_cpus), in_use = in_use == '1',
    plain = plain ~= '-' and need_of(plain), -- '-': it takes no plain jobs
    ageing_ms = tonumber(ageing), reserve_ms = tonumber(reserve_ms), hold_ms = tonumber(hold_ms), reserved = '', highest_passed = -math.huge}
  if held then
    serve_reserved(held, need_of(need))
  end
end

-- The worker took tokens of these lists: they may be unknown among the heads, and must be rung for again if
-- this call leaves jobs in them.
local function heed(popped)
  for _, queue in ipairs(words_of(popped)) do
    if redis.call('SISMEMBER', K.PAUSED, string.match(queue, '^[^@]*')) == 0 then
      touched[queue] = lists.look_at_head(queue) or false
    end
  end
end

-- Returns 1 if more may fit, for which the worker must count its GPUs anew, and the list for which it holds room.
local function finish()
  local filled, bells = {}, {}
  for queue, since in pairs(touched) do
    if since and quiet[queue] then
      -- to ring would wake this worker again, for nothing
    elseif since then
      filled[#filled + 1], bells[#bells + 1] = queue, key('wake', queue)
    else
      redis.call('DEL', key('wake', queue))
    end
  end
  if #bells > 0 and redis.call('EXISTS', unpack(bells)) < #bells then
    for _, queue in ipairs(filled) do
      ring(queue)
    end
  end
  return left.has_given_gpus and left.slots > 0 and 1 or 0, left.reserved
end

return {begin = begin, heed = heed, claim_from = claim_from, finish = finish}
