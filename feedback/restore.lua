-- Puts a record back at its own place in the log, behind all that is there. XADD itself refuses any other place.
-- KEYS  1 fb:log (stream)  2 fb:id:* (string)  3 fb:pair:* (string; comparisons and ratings only)
-- ARGV  1 stream id  2 kind  3 record id  4 json  5 sha256 of json  6 task, "" for none
-- Returns 1, or 0 where the log has that record id at another place.
if redis.call('EXISTS', KEYS[2]) == 1 then
  return 0
end
redis.call('XADD', KEYS[1], ARGV[1], 'kind', ARGV[2], 'id', ARGV[3], 'json', ARGV[4], 'sha256', ARGV[5])
redis.call('SET', KEYS[2], ARGV[1])
if KEYS[3] then
  local task = string.match(redis.call('GET', KEYS[3]) or '', ' (%S+)$')
  -- As in append.lua.
  if not task or ARGV[6] == '' or ARGV[6] == task then
    redis.call('SET', KEYS[3], ARGV[3] .. ' ' .. (task or ARGV[6]))
  end
end
return 1
