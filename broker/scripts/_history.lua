-- What `tally` and `observe` have added up, written down.
local MOST_HISTORIES = 100 -- queues that have a record of their own; the others share one

local write_sums

-- Whether that queue has a record of its own; a new one gets it while there are few.
local function has_history(base)
  if redis.pcall('ZSCORE', K.HISTORIES, base) then
    return true
  end
  return redis.call('ZCARD', K.HISTORIES) < MOST_HISTORIES and redis.call('ZADD', K.HISTORIES, NOW_MS, base) == 1
end

-- Returns whether that was not there before.
local function add(record, what, n)
  n = n - n % 1
  local total = redis.pcall('HINCRBY', record, what, digits[n])
  if type(total) == 'table' then -- damaged; ours alone
    redis.call('DEL', record)
    total = redis.call('HINCRBY', record, what, digits[n])
  end
  return total == n
end

function write_sums(base, sums)
  local record, is_new = key('history', base), false
  for what, n in pairs(sums) do
    if type(n) == 'number' then
      is_new = add(record, what, n) or is_new
    else
      for bound, times in pairs(n) do
        is_new = add(record, what .. ':' .. bound, times) or is_new
      end
    end
  end
  if is_new and base ~= OTHER_QUEUES and not has_history(base) then
    redis.call('DEL', record)
    write_sums(OTHER_QUEUES, sums)
  end
end

local function write_history()
  for _, base in ipairs(counted) do
    write_sums(base, sums_of[base])
  end
end

return {write_history = write_history}
