-- Takes one record out of the log, with all that names it but its idempotency key.
-- KEYS  1 fb:log (stream)  2 fb:id:* (string)  3 fb:pair:* (string; comparisons and ratings only)
--       4 task:seen:* (set; comparisons only)
-- ARGV  1 stream id  2 record id  3 digest of the prompt
-- Returns 1, or 0 where it was gone already.
local removed = redis.call('XDEL', KEYS[1], ARGV[1])
if redis.call('GET', KEYS[2]) == ARGV[1] then
  redis.call('DEL', KEYS[2])
end
if KEYS[3] and string.match(redis.call('GET', KEYS[3]) or '', '^%S+') == ARGV[2] then
  redis.call('DEL', KEYS[3])
end
if KEYS[4] then
  redis.call('SREM', KEYS[4], ARGV[3])
end
return removed
