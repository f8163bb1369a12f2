-- Deletes the idempotency keys whose record is no longer in the log.
-- KEYS  1 fb:log (stream)  2... fb:idem:* (string)
-- Returns how many.
local forgotten = 0
for i = 2, #KEYS do
  local first = redis.call('GET', KEYS[i])
  local stream_id = first and string.match(first, '^(%S+) ')
  if stream_id and #redis.call('XRANGE', KEYS[1], stream_id, stream_id) == 0 then
    forgotten = forgotten + redis.call('DEL', KEYS[i])
  end
end
return forgotten
