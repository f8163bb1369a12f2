-- The stored completions behind a place, in the order of (time, id), a batch of them.
-- KEYS  1 gen:by:* (zset: completion ids by time)
-- ARGV  1 "asc" | "desc"  2 how many  3 id and 4 time of the place; neither for the beginning
-- Returns {id, time, id, time, ...}.
local range, rank = 'ZRANGE', 'ZRANK'
if ARGV[1] == 'desc' then
  range, rank = 'ZREVRANGE', 'ZREVRANK'
end
local first = 0
if ARGV[3] then
  local place = redis.call(rank, KEYS[1], ARGV[3])
  if place then
    first = place + 1
  else
    -- Deleted since it was read: Redis itself says where it would be, by its own order of times and ids.
    redis.call('ZADD', KEYS[1], ARGV[4], ARGV[3])
    first = redis.call(rank, KEYS[1], ARGV[3])
    redis.call('ZREM', KEYS[1], ARGV[3])
  end
end
return redis.call(range, KEYS[1], first, first + ARGV[2] - 1, 'WITHSCORES')
